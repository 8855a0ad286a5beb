"""`python -m omniopd`, and so `accelerate launch -m omniopd`: the command line."""

from omniopd.cli import command_line

command_line()
