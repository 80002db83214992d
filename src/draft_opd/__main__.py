"""`python -m draft_opd`, as torch's launcher starts it."""

from draft_opd.cli.main import main

if __name__ == "__main__":
    main()
