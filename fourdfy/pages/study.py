"""The page of a user study: two clips side by side, and questions about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fourdfy.pages.page import escaped, page

VIDEO = '<video id="{0}" aria-label="{0} clip" muted loop autoplay playsinline></video>'
TASK = f"""<main id="task" hidden>
<div class="row"><progress id="progress"></progress><span id="count"></span></div>
<p class="soft">Text</p><h2 id="prompt"></h2>
<div id="pair">{VIDEO.format("left")}{VIDEO.format("right")}</div>
<p id="failed" role="alert"></p><div id="questions"></div>
<div class="row"><button type="button" id="next">Next</button><span id="wait" role="status"></span></div>
<p class="soft">Keys: &#8592; left, &#8595; about the same, &#8594; right, &#8593; the question before, Enter
next.</p></main>
"""
END = """<main id="end" hidden><h1>Thank you</h1><p id="told" role="status"></p>
<p><button type="button" id="save">Save the answers as a file</button>
<button type="button" id="another">Another person begins</button></p></main>
"""


def study_page(
    study: str,
    title: str,
    consent: str,
    instructions: str,
    *,
    questions: Mapping[str, str],
    pairs: Sequence[tuple[str, str, str]],
    clips: Mapping[str, str],
    comparisons: int,
    checks: int,
) -> str:
    """The page, which names no method.

    Args:
        study: what answers name, to be told from those of other studies.
        pairs: (clip, clip, prompt).
        clips: name -> address beside the page.
        comparisons: of each rater.
        checks: questions for each rater that say what to answer.
    """
    texts = "".join(
        f"<p>{escaped(part)}</p>" for text in (consent, instructions) for part in text.split("\n\n")
    )
    start = (
        f'<main id="consent" hidden><h1>{escaped(title)}</h1>{texts}'
        '<p><button type="button" id="agree">I agree, begin</button></p></main>'
    )
    held = {"study": study, "questions": [*questions.items()], "pairs": pairs, "clips": clips}
    return page(
        title,
        f"{start}{TASK}{END}",
        scripts=["study.js"],
        data={**held, "comparisons": comparisons, "checks": checks},
        allowed="media-src 'self' file:; connect-src 'self'",
    )
