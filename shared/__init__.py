"""What both services agree on: errors, wire schemas, vector encoding, settings, the HTTP chassis, the device worker."""
