"""Text to token ids and back: tokenizers, chat templates, and what in an answer is reasoning."""
