"""GPT-2 and nothing else: the forward pass, sampling, and guesses of what comes next."""
