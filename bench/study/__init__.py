"""The study: the claims of Golmant et al. (2018) and the advice of pybatch, on every domain that ships."""
