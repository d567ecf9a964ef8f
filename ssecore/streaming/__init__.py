"""The life of a stream: a generator at work, the sender, and what makes generators."""
