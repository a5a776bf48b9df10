"""Turn a small chat model into a fitness question-answering bot with Direct Preference Optimization."""
