"""Language models of other families as the decoder, a family in each file."""
