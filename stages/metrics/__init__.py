"""Numbers from texts and likelihoods, with intervals."""
