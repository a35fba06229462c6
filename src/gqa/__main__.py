"""`python -m gqa` is `gqa`."""

from gqa.cli.main import main

if __name__ == "__main__":
    main()
