"""What a browser would find in a page, without one."""

from html.parser import HTMLParser

EVIL = """</script><script>document.body.remove()</script>"'><img src=http://leak.test/1 onerror=open("/")>"""
"""What a user may type."""

VOID = {"img", "input", "meta", "br"}


class Found(HTMLParser):
    """The elements of a page and the texts in them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self._texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self._texts.append((tag, []))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, text):
        if self._open:
            next(texts for tag, texts in reversed(self._texts) if tag == self._open[-1]).append(text)

    def of(self, tag):
        """The attributes of all such elements."""
        return [attributes for name, attributes in self.tags if name == tag]

    def under(self, tag):
        """The text that stands directly in each such element."""
        return ["".join(texts) for name, texts in self._texts if name == tag]

    def is_inert(self):
        """Whether it has no script but its own, no handler, and no address but those of data."""
        assert [given.get("type") for given in self.of("script")] == ["application/json", None]
        names = {name for _, given in self.tags for name in given}
        assert not any(name.startswith("on") or name == "style" for name in names)
        return all(given["src"].startswith("data:image/") for given in self.of("img"))
