"""Helpers for all other packages: files, figures, devices, random numbers, errors, text.

- errors: `UserError`, the exceptions that a command shows without a traceback.
- model_files: finding the damaged file of a model's folder, before a library loads it.
- ranges: checking that numbers are in their range.
- redaction: hiding passwords, signatures and access tokens in text.
- markdown: writing any text into Markdown, for cards.
- files: writing files and folders so that an interrupted run leaves no half-written result.
- figures: pictures of predictions, label maps, confusion matrices and losses (needs matplotlib).
- devices: starting Accelerate in the same way in every command.
- measuring: the memory of this process, and durations as text.
- seeding: random numbers that depend on a seed, a purpose and an index only.

It imports no other package of co2s_hf.
"""
