"""The record of questions: rows in, reports out."""
