"""Video: records of data sets, decoding, features of clips, and the head that tells when something happens."""
