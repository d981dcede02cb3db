"""Is a run right? Files against their manifests, contents against each other, numbers made again.

``verify`` walks what ``storage.layout`` lists; ``deep`` computes some rows again by the dense reference.
Letters: N training samples, n of them sampled, Q sampled test samples, D parameters, G groups.
"""
