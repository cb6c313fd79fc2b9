"""Bits by budget: which scheme each part of a model gets, so that a size or a quality is kept.

`units` says what is allocated and what each scheme of it takes up, `fisher` what it would cost in KL, to second order;
`solve` finds the best allocation of a budget exactly, `judge` measures the real KL of several, and `allocate` goes from
one to the other.
"""
