"""How much a teacher's continuation resembles what the student wrote: one score function per file, found by name.

A score takes pairs of (`Chunk`, `Reply`) and returns one number in [0, 1] for each. The pairs come cut to equal length
(see `omniopd.verification.text.comparable`). A score without settings may be a plain function.
"""
