"""Features and their products: what every kind of feature offers, and how tiles are summed. No models."""
