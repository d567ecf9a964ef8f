"""A request and its answer: routes, bodies, who may enter."""
