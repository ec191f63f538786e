"""Why each request was routed as it was, and what people said of it: records, their store, feedback."""
