"""`python -m collie_lab`: the shell's commands, as `collie-lab`."""

from collie_lab.cli import app

if __name__ == "__main__":
    app(prog_name="collie-lab")
