"""Synthetic scenes with texts about them, and the recipe that trains the model that ships with the package.

    python -m examples.scenes data --split train --num 1000     pictures and records for `vlm train`
    python -m examples.scenes.train out                         the whole recipe

A scene (`world`) is drawn (`draw`) and spoken of (`texts`); records of both go to files (`write`). The parts of the
model are a vision encoder (`vision`) and a language model (`language`).
"""
