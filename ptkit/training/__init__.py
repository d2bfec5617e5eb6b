"""One run: train one adapter on one base, resume it, measure it."""
