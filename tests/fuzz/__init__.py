"""Files and templates as nobody should write them: a reader may refuse, with an error that names the file, and no more.

The suite runs a few seconds of each test, the same cases every time; `python -m tests.fuzz` goes on for minutes, with
other cases each time, and takes pytest's options.
"""
