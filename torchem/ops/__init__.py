"""Pure tensor functions: no modules, no state, differentiable unless they say otherwise."""
