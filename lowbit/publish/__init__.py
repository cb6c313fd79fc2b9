"""What others see of a quantized model: its card on the Hub, and the page of the run that made it."""

from lowbit.publish.card import model_card
from lowbit.publish.facts import Facts
from lowbit.publish.upload import Publication, push

__all__ = ["Facts", "Publication", "model_card", "push"]
