"""refrag's library: chunking, models, storage and the runtime that answers from a prebuilt index."""
