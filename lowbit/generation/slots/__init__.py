"""Requests that share the steps of one model: each joins and leaves between two of them."""

from lowbit.generation.slots.scheduler import Job, Scheduler
from lowbit.generation.slots.slots import End, Slots, refuse_slots

__all__ = ["End", "Job", "Scheduler", "Slots", "refuse_slots"]
