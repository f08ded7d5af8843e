"""``python -m isthmus``: the command line, as ``torchrun -m isthmus`` starts it."""

from isthmus.cli.main import app

app(prog_name="isthmus")
