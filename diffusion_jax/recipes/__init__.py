"""One short study a published system, which proves a method of the packages; nothing is imported from here.

A study is a module `recipes/<slug>.py` with `study(s: Study) -> Results`, a config `configs/recipes/<slug>.py` with the
variants `smoke` and `paper`, and the text of its page, `recipes/<slug>.md`. CONTRIBUTING.md has the pattern.
"""
