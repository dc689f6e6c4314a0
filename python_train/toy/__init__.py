"""The two-dimensional toy system of the autoguidance paper (Appendix C; spec 11): ``python -m python_train.toy``."""
