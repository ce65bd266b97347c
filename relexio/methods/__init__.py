"""T-space: methods, fits, and skill. Everything here is a pure function of T x T numbers; no tensor is seen."""
