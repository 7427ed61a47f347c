"""Evidence about token scores: do they point at the tokens that matter?"""
