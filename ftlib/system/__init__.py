"""What every package stands on: files, tables, Ctrl-C, printed lines."""
