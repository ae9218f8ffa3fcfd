"""Measuring any images: where they come from (`image_sets`), the networks in whose features they are compared
(`feature_extractors`, `trained_extractors`), and the measures of a report (`measures`). The command is `evaluate`.
"""
