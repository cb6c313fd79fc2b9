"""A model behind the OpenAI API: the server of transformers, answers of lowbit's own loop, and a guard before both."""
