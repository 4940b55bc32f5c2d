// Included by AVX2's and AVX512's files in an unnamed namespace, after kAhead.

// Where the weights are that will be read kAhead bytes later, when `together` rows are read side by side.
class Ahead {
 public:
  Ahead(size_t k, size_t together)
      : k_(k), skip_((together - 1) * k), groups_(kAhead / (together * k) * together * k),
        columns_(kAhead % (together * k) / together / 64 * 64) {}
  size_t operator()(size_t at) const {
    const size_t column = at + columns_;
    return groups_ + (column < k_ ? column : column + skip_);
  }

 private:
  size_t k_, skip_, groups_, columns_;
};
