"""Train, evaluate or check a text-to-4D experiment; ``python launch.py --help`` says how."""

import sys

if __name__ == "__main__":
    try:
        from fourdfy.launching.cli import main

        raise SystemExit(main())
    except KeyboardInterrupt:  # before signals are heard
        sys.stderr.write("stopped by SIGINT; run the same command again\n")
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("fourdfy"):
            raise
        raise SystemExit(
            f"error: {sys.executable} has no {error.name}; type first: source .venv/bin/activate\n"
            "Is there no .venv yet? make install, or python3 -m venv .venv && .venv/bin/pip install -e ."
        ) from None
