"""`python -m gradcost`: the command line."""

from gradcost.cli.main import main

if __name__ == "__main__":
    main()
