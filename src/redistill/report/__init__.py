"""One HTML page about one or more run folders: a pure reader of what `runlog.py` and its kin leave behind.

`folder` finds the files; `curves`, `revisions`, `views`, `answers` and `scores` make of them what a page can hold;
`verdict` says it in a sentence; `page` puts it together; `server` shows it while the run goes on.
"""
