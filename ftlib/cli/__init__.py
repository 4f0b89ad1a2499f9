"""The command `ftlib`."""


def main(args=None):
    "Run the command line; `args` is a list of words, by default those of the shell."
    from .parser import main
    return main(args)
