"""Train, evaluate or check a text-to-4D experiment; ``python launch.py --help`` says how."""

from fourdfy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
