"""Drawing for users: what was asked for, read from words or a file; references cut out; pictures that say how they were
made; and a page in the browser. What reads and checks imports nothing that takes seconds."""
