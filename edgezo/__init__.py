"""edgezo: fine-tune language models with nothing but an inference engine."""
