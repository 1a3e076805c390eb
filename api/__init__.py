"""Make a language model forget a topic, with proof."""
