// SPDX-License-Identifier: Apache-2.0
// A basis for keys in which few components carry what queries see: the Karhunen-Loeve transform of keys whitened by
// the queries' second moments.
// One idea: an error e of a key costs (q.e)^2, on average e'Ce with C = E[qq']; in the basis of sqrt(C) k that cost is
// the plain square, and the eigenvectors of its second moments are the basis whose components are worth the most bits
// apart.
//   calibrate::weighted_basis(keys, queries, basis, basis_inverse);
#pragma once

#include <algorithm>
#include <cmath>
#include <packkv/calibrate/samples.hpp>

namespace packkv::calibrate {

/// What is added to the queries' second moments, as a part of their mean: directions in which the queries seen so far
/// do not point must not be free.
inline constexpr double basis_regularisation = 0.3;

namespace detail {

/// Square matrices of doubles, row by row.
struct square_matrix {
  int n = 0;
  std::vector<double> x;

  explicit square_matrix(int size, double diagonal = 0.0)
      : n(size), x(static_cast<std::size_t>(size) * static_cast<std::size_t>(size), 0.0) {
    for (int i = 0; i < n; ++i) (*this)(i, i) = diagonal;
  }
  double& operator()(int i, int j) {
    return x[static_cast<std::size_t>(i) * static_cast<std::size_t>(n) + static_cast<std::size_t>(j)];
  }
  double operator()(int i, int j) const {
    return x[static_cast<std::size_t>(i) * static_cast<std::size_t>(n) + static_cast<std::size_t>(j)];
  }
};

inline square_matrix product(const square_matrix& a, const square_matrix& b) {
  square_matrix out(a.n);
  for (int i = 0; i < a.n; ++i)
    for (int k = 0; k < a.n; ++k)
      for (int j = 0; j < a.n; ++j) out(i, j) += a(i, k) * b(k, j);
  return out;
}

/// E[x x'] of the samples; the unit matrix if there are none.
inline square_matrix second_moment_matrix(const samples& s) {
  square_matrix m(s.head_dim, s.count > 0 ? 0.0 : 1.0);
  for (std::int64_t t = 0; t < s.count; ++t)
    for (int i = 0; i < m.n; ++i)
      for (int j = 0; j <= i; ++j)
        m(i, j) +=
            static_cast<double>(s.token(t)[i]) * static_cast<double>(s.token(t)[j]) / static_cast<double>(s.count);
  for (int i = 0; i < m.n; ++i)
    for (int j = 0; j < i; ++j) m(j, i) = m(i, j);
  return m;
}

/// Eigenvectors of a symmetric matrix, as rows in order of falling eigenvalue.
struct eigen_system {
  std::vector<double> value;
  square_matrix vector;
};
/// By Jacobi rotations, a sweep over all pairs after the other until nothing is left off the diagonal.
inline eigen_system eigen_system_of(square_matrix a) {
  const int n = a.n;
  square_matrix v(n, 1.0);
  double all = 0.0;
  for (const double x : a.x) all += x * x;
  for (int sweep = 0; sweep < 60; ++sweep) {
    double off = 0.0;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < i; ++j) off += a(i, j) * a(i, j);
    if (!(off > 1e-26 * all)) break;
    for (int p = 0; p < n; ++p)
      for (int q = p + 1; q < n; ++q) {
        if (a(p, q) == 0.0) continue;
        const double theta = (a(q, q) - a(p, p)) / (2.0 * a(p, q));
        const double t = (theta < 0.0 ? -1.0 : 1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1.0));
        const double c = 1.0 / std::sqrt(t * t + 1.0), s = t * c;
        for (int k = 0; k < n; ++k) {
          const double x = a(k, p), y = a(k, q);
          a(k, p) = c * x - s * y;
          a(k, q) = s * x + c * y;
        }
        for (int k = 0; k < n; ++k) {
          const double x = a(p, k), y = a(q, k);
          a(p, k) = c * x - s * y;
          a(q, k) = s * x + c * y;
        }
        for (int k = 0; k < n; ++k) {
          const double x = v(p, k), y = v(q, k);
          v(p, k) = c * x - s * y;
          v(q, k) = s * x + c * y;
        }
      }
  }
  std::vector<int> order(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = i;
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return a(i, i) > a(j, j); });
  eigen_system out{{}, square_matrix(n)};
  for (int i = 0; i < n; ++i) {
    const int from = order[static_cast<std::size_t>(i)];
    out.value.push_back(a(from, from));
    for (int k = 0; k < n; ++k) out.vector(i, k) = v(from, k);
  }
  return out;
}

/// m^power of a symmetric matrix with positive eigenvalues.
inline square_matrix power_of(const eigen_system& m, double power) {
  const int n = m.vector.n;
  square_matrix out(n);
  for (int e = 0; e < n; ++e) {
    const double x = std::pow(m.value[static_cast<std::size_t>(e)], power);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) out(i, j) += x * m.vector(e, i) * m.vector(e, j);
  }
  return out;
}

inline void find_basis(const samples& tokens, const input_view<3>& queries, float* basis, float* basis_inverse) {
  const int n = tokens.head_dim;
  square_matrix root(n, 1.0), inverse_root(n, 1.0);
  square_matrix cost = second_moment_matrix(load_queries(queries, n));
  double trace = 0.0;
  for (int i = 0; i < n; ++i) trace += cost(i, i);
  if (queries.data != nullptr && trace > 0.0) {
    for (int i = 0; i < n; ++i) cost(i, i) += basis_regularisation * trace / n;
    const eigen_system of_cost = eigen_system_of(cost);
    root = power_of(of_cost, 0.5);
    inverse_root = power_of(of_cost, -0.5);
  }
  const square_matrix axes = eigen_system_of(product(product(root, second_moment_matrix(tokens)), root)).vector;
  const square_matrix coding = product(axes, root), decoding = product(axes, inverse_root);
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < n; ++c) {
      basis[i * n + c] = static_cast<float>(decoding(i, c));
      // Calibration refuses null arrays. NOLINTNEXTLINE(clang-analyzer-core.NullDereference)
      basis_inverse[c * n + i] = static_cast<float>(coding(i, c));
    }
}

}  // namespace detail

/// The basis of one head from x [tokens, head_dim] and queries [heads of the group, n, head_dim], any strides and
/// dtypes: component i is the i-th eigenvector, of falling eigenvalue, of sqrt(C) E[xx'] sqrt(C), C = E[qq'] + 0.3
/// trace / head_dim. With a null view of queries C is 1 and the basis orthogonal: that is what values want.
/// basis, basis_inverse [head_dim, head_dim] as side_parameters has them. Tokens and queries with a non-finite channel
/// are left out.
inline void weighted_basis(const input_view<2>& x, const input_view<3>& queries, float* basis, float* basis_inverse) {
  detail::samples tokens{static_cast<int>(x.extent[1]), 0, {}};
  detail::append_rows(tokens, x, max_samples);
  detail::find_basis(tokens, queries, basis, basis_inverse);
}

}  // namespace packkv::calibrate
