"""Do the credits point at the tokens that matter? Tasks whose carriers are known, and decoders that solve them."""
