"""Publishing a quantized folder on the Hub: its model card, and the upload."""

from lowbit.publish.card import model_card
from lowbit.publish.facts import Facts
from lowbit.publish.upload import Publication, push

__all__ = ["Facts", "Publication", "model_card", "push"]
