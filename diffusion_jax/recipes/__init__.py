"""One short study per published system, which tests the claims for a method of the other packages.

A study is a module `recipes/<slug>.py` with `study(s: Study) -> Results`, a config `configs/recipes/<slug>.py` with the
variants `smoke` and `paper`, and the text of its page, `recipes/<slug>.md`. Nothing imports from here. CONTRIBUTING.md
shows how to write one.
"""
