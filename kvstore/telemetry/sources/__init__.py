"""Where events come from: files and stdin, a kvstore stream, Kafka. One module each."""
