// Twin of src/rules/adafactor.rs.
//
//     sizes       chunks                            Σθ²
//     squares     pieces of rows and of columns     Σg²; R and C of lines of one piece
//     means       longer lines                      R, C
//     stacks      pieces of R                       ΣR; max(mean(R), ε₁) of matrices of one piece
//     floors      taller matrices                   max(mean(R), ε₁)
//     estimates   chunks                            V̂ without rows; ΣU²
//     factors     tensors                           −α/max(1, RMS(U)/d)
//     update      chunks                            θ
//     flush       lines                             R, C as they are kept
//
// In `scratch`: by chunk Σθ², by chunk ΣU², the factor, by matrix a floor, then the partial sums of rows, columns and
// stacks that have several pieces.

struct Scalars {
    weight: f32,
    shrink: f32,
    smallest: f32,
    eps1: f32,
    eps2_hi: f32,
    eps2_lo: f32,
    rho_hi: f32,
    rho_lo: f32,
    d_hi: f32,
    d_lo: f32,
}

const CHUNKS: u32 = 0u;
const PIECES: u32 = 1u;
const LONG_LINES: u32 = 2u;
const STACKS: u32 = 3u;
const LONG_STACKS: u32 = 4u;
const TENSORS: u32 = 5u;
const LINES: u32 = 6u;

const ROW_VAR: u32 = 0u;
const COL_VAR: u32 = 1u;
const VARIANCE: u32 = 2u;

// Elements of a piece of a line of n, and how many pieces it has.
fn piece_len(n: u32) -> u32 {
    return max((n + MOST_PIECES - 1u) / MOST_PIECES, PIECE);
}

fn pieces(n: u32) -> u32 {
    return (n + piece_len(n) - 1u) / piece_len(n);
}

fn partial_at(at: u32) -> Sum {
    return sum_in(vec4<u32>(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]));
}

fn keep_partial(at: u32, sum: Sum) {
    let words = words_of(sum);
    scratch[at] = words.x;
    scratch[at + 1u] = words.y;
    scratch[at + 2u] = words.z;
    scratch[at + 3u] = words.w;
}

// Where things lie in `scratch`.
fn size_at(t: Tensor, chunk: u32) -> u32 {
    return t.areas[0] + 4u * chunk;
}

fn square_at(t: Tensor, chunk: u32) -> u32 {
    return size_at(t, chunks_of(t) + chunk);
}

fn factor_at(t: Tensor) -> u32 {
    return size_at(t, 2u * chunks_of(t));
}

fn floor_at(t: Tensor, matrix: u32) -> u32 {
    return factor_at(t) + 4u + matrix;
}

fn row_partial_at(t: Tensor, row: u32, piece: u32) -> u32 {
    return floor_at(t, t.matrices) + 4u * (row * pieces(t.columns) + piece);
}

fn column_partial_at(t: Tensor, column: u32, piece: u32) -> u32 {
    let long_rows = select(0u, t.matrices * t.rows, t.columns > PIECE);
    return row_partial_at(t, long_rows, 0u) + 4u * (column * pieces(t.rows) + piece);
}

fn stack_partial_at(t: Tensor, matrix: u32, piece: u32) -> u32 {
    let long_columns = select(0u, t.matrices * t.columns, t.rows > PIECE);
    return column_partial_at(t, long_columns, 0u) + 4u * (matrix * pieces(t.rows) + piece);
}

fn keep_row(t: Tensor, row: u32, sum: Sum) {
    let at = t.slots[ROW_VAR] + row;
    let mean = bitcast<f32>(mean_bits(sum, t.columns));
    row_var[at] = lerp(vec4<f32>(row_var[at]), vec4<f32>(mean), work.rows[t.row].c.weight).x;
}

fn keep_column(t: Tensor, column: u32, sum: Sum) {
    let at = t.slots[COL_VAR] + column;
    let mean = bitcast<f32>(mean_bits(sum, t.rows));
    col_var[at] = lerp(vec4<f32>(col_var[at]), vec4<f32>(mean), work.rows[t.row].c.weight).x;
}

// The larger of two; the first where it is NaN.
fn at_least(x: vec4<f32>, bound: f32) -> vec4<f32> {
    return select(x, vec4<f32>(bound), !is_nan(x) & (x < vec4<f32>(bound)));
}

fn keep_floor(t: Tensor, matrix: u32, sum: Sum) {
    // Rounding keeps order: the larger of the rounded two is the larger one rounded.
    let mean = vec4<f32>(bitcast<f32>(mean_bits(sum, t.rows)));
    scratch[floor_at(t, matrix)] = bitcast<u32>(at_least(mean, work.rows[t.row].c.eps1).x);
}

@compute @workgroup_size(WORKGROUP)
fn sizes(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid);
    if (!is_there(CHUNKS, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(CHUNKS, number)];
    let chunk = number - t.first[CHUNKS];
    let first4 = t.parameter4 + chunk * (table.chunk / 4u);
    var sum = nothing();
    // Padding is zero.
    for (var i = lane; 4u * i < chunk_len(t, chunk); i += WORKGROUP) {
        sum = with_squares(sum, parameters_at(first4 + i));
    }
    let total = sum_of_workgroup(lane, sum);
    if (lane == 0u) {
        keep_partial(size_at(t, chunk), total);
    }
}

// Numbers of the gradient a stride apart: as many as `count` says and four at most, and zeros after them.
fn gradient_four(at: u32, stride: u32, count: u32) -> vec4<f32> {
    if (stride == 1u && at % 4u == 0u && count >= 4u) {
        return gradients_at(at / 4u);
    }
    let i = vec4<u32>(at) + stride * near(count);
    let g = vec4<f32>(gradient_at(i.x), gradient_at(i.y), gradient_at(i.z), gradient_at(i.w));
    return select(vec4<f32>(0.0), g, FOUR < vec4<u32>(count));
}

@compute @workgroup_size(WORKGROUP)
fn squares(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid) * WORKGROUP + lane;
    if (!is_there(PIECES, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(PIECES, number)];
    let item = number - t.first[PIECES];
    let rows = t.matrices * t.rows;
    let of_row = pieces(t.columns);
    let is_row = item < rows * of_row;
    // Neighbouring lanes have neighbouring pieces of a row, but neighbouring columns.
    let below = item - rows * of_row;
    let line = select(below / (t.columns * pieces(t.rows)) * t.columns + below % t.columns, item / of_row, is_row);
    let piece = select(below / t.columns % pieces(t.rows), item % of_row, is_row);
    let length = select(t.rows, t.columns, is_row);
    let stride = select(t.columns, 1u, is_row);
    let column_at = line / t.columns * t.rows * t.columns + line % t.columns;
    let skipped = piece * piece_len(length);
    let begin = select(column_at, line * t.columns, is_row) + skipped * stride;
    let count = min(piece_len(length), length - skipped);
    let row = work.rows[t.row];
    var sum = nothing();
    for (var i = 0u; i < count; i += 4u) {
        let g = gradient_four(4u * t.gradient4 + begin + i * stride, stride, count - i);
        sum = with_squares(sum, ready(row, g));
    }
    sum = gathered(sum);
    if (is_row) {
        if (of_row == 1u) {
            keep_row(t, line, sum);
        } else {
            keep_partial(row_partial_at(t, line, piece), sum);
        }
    } else {
        if (t.rows <= PIECE) {
            keep_column(t, line, sum);
        } else {
            keep_partial(column_partial_at(t, line, piece), sum);
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn means(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid) * WORKGROUP + lane;
    if (!is_there(LONG_LINES, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(LONG_LINES, number)];
    let item = number - t.first[LONG_LINES];
    let long_rows = select(0u, t.matrices * t.rows, t.columns > PIECE);
    var sum = nothing();
    if (item < long_rows) {
        for (var piece = 0u; piece < pieces(t.columns); piece += 1u) {
            sum = joined(sum, partial_at(row_partial_at(t, item, piece)));
        }
        keep_row(t, item, gathered(sum));
    } else {
        for (var piece = 0u; piece < pieces(t.rows); piece += 1u) {
            sum = joined(sum, partial_at(column_partial_at(t, item - long_rows, piece)));
        }
        keep_column(t, item - long_rows, gathered(sum));
    }
}

@compute @workgroup_size(WORKGROUP)
fn stacks(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid) * WORKGROUP + lane;
    if (!is_there(STACKS, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(STACKS, number)];
    let item = number - t.first[STACKS];
    let matrix = item / pieces(t.rows);
    let piece = item % pieces(t.rows);
    let skipped = piece * piece_len(t.rows);
    let begin = t.slots[ROW_VAR] + matrix * t.rows + skipped;
    let count = min(piece_len(t.rows), t.rows - skipped);
    var sum = nothing();
    for (var i = 0u; i < count; i += 4u) {
        let at = vec4<u32>(begin + i) + near(count - i);
        let r = vec4<f32>(row_var[at.x], row_var[at.y], row_var[at.z], row_var[at.w]);
        sum = with_numbers(sum, select(vec4<f32>(0.0), r, FOUR < vec4<u32>(count - i)));
    }
    sum = gathered(sum);
    if (t.rows <= PIECE) {
        keep_floor(t, matrix, sum);
    } else {
        keep_partial(stack_partial_at(t, matrix, piece), sum);
    }
}

@compute @workgroup_size(WORKGROUP)
fn floors(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid) * WORKGROUP + lane;
    if (!is_there(LONG_STACKS, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(LONG_STACKS, number)];
    let matrix = number - t.first[LONG_STACKS];
    var sum = nothing();
    for (var piece = 0u; piece < pieces(t.rows); piece += 1u) {
        sum = joined(sum, partial_at(stack_partial_at(t, matrix, piece)));
    }
    keep_floor(t, matrix, gathered(sum));
}

// V̂ of elements of one row: r·c/max(mean(R), ε₁).
fn estimate_in(t: Tensor, row: u32, columns: vec4<u32>) -> vec4<f32> {
    let matrix = row / t.rows;
    let r = row_var[t.slots[ROW_VAR] + row];
    let at = vec4<u32>(t.slots[COL_VAR] + matrix * t.columns) + columns;
    let c = vec4<f32>(col_var[at.x], col_var[at.y], col_var[at.z], col_var[at.w]);
    return (r * c) / bitcast<f32>(scratch[floor_at(t, matrix)]);
}

fn estimate_at(t: Tensor, i: u32) -> f32 {
    return estimate_in(t, i / t.columns, vec4<u32>(i % t.columns)).x;
}

// V̂ of four elements from `begin` on.
fn estimate(t: Tensor, begin: u32) -> vec4<f32> {
    let i = vec4<u32>(begin) + near(t.len - begin);
    if (t.matrices == 0u) {
        let at = vec4<u32>(t.slots[VARIANCE]) + i;
        return vec4<f32>(variance[at.x], variance[at.y], variance[at.z], variance[at.w]);
    }
    let column = begin % t.columns;
    if (column + 3u < t.columns) {
        return estimate_in(t, begin / t.columns, vec4<u32>(column) + FOUR);
    }
    return vec4<f32>(estimate_at(t, i.x), estimate_at(t, i.y), estimate_at(t, i.z), estimate_at(t, i.w));
}

// U of elements with this estimate.
fn direction(c: Scalars, v: vec4<f32>, g: vec4<f32>) -> vec4<f32> {
    return (vec4<f32>(1.0) / sqrt(at_least(v, c.smallest))) * g;
}

fn keep_variance_at(t: Tensor, i: u32, v: f32) {
    if (i < t.len) {
        variance[t.slots[VARIANCE] + i] = v;
    }
}

fn keep_variance(t: Tensor, begin: u32, v: vec4<f32>) {
    keep_variance_at(t, begin, v.x);
    keep_variance_at(t, begin + 1u, v.y);
    keep_variance_at(t, begin + 2u, v.z);
    keep_variance_at(t, begin + 3u, v.w);
}

@compute @workgroup_size(WORKGROUP)
fn estimates(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid);
    if (!is_there(CHUNKS, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(CHUNKS, number)];
    let chunk = number - t.first[CHUNKS];
    let row = work.rows[t.row];
    var sum = nothing();
    for (var i = lane; 4u * i < chunk_len(t, chunk); i += WORKGROUP) {
        let begin = chunk * table.chunk + 4u * i;
        let g = ready(row, gradients_at(t.gradient4 + begin / 4u));
        var v = estimate(t, begin);
        if (t.matrices == 0u) {
            v = lerp(v, g * g, row.c.weight);
            keep_variance(t, begin, v);
        }
        let u = direction(row.c, v, g);
        sum = with_squares(sum, select(vec4<f32>(0.0), u, lanes_inside(i, chunk_len(t, chunk))));
    }
    let total = sum_of_workgroup(lane, sum);
    if (lane == 0u) {
        keep_partial(square_at(t, chunk), total);
    }
}

fn is_less(a: Double, b: Double) -> bool {
    return a.hi.x < b.hi.x || (a.hi.x == b.hi.x && a.lo.x < b.lo.x);
}

// −α/max(1, RMS(U)/d), as bits.
fn factor_bits(c: Scalars, n: u32, size: Sum, square: Sum) -> u32 {
    var alpha = root(divided(size.value, whole(n)));
    var exponent = size.exponent / 2;
    let eps2 = Double(vec4<f32>(c.eps2_hi), vec4<f32>(c.eps2_lo));
    if (is_less(alpha, double_scaled(eps2, -exponent)) && size.found == 0u) {
        alpha = eps2;
        exponent = 0;
    }
    alpha = times(alpha, Double(vec4<f32>(c.rho_hi), vec4<f32>(c.rho_lo)));
    var clipping = divided(root(divided(square.value, whole(n))), Double(vec4<f32>(c.d_hi), vec4<f32>(c.d_lo)));
    let clipping_bits = rounded(clipping, square.exponent / 2, 0u);
    let clips = clipping_bits > 0x3f800000u || (clipping_bits == 0x3f800000u && clipping.lo.x >= 0.0);
    if (clips) {
        exponent -= square.exponent / 2;
    } else {
        clipping = double(vec4<f32>(1.0));
    }
    var found = (size.found | square.found) & HAS_NAN;
    if ((size.found & HAS_INFINITY) != 0u) {
        // ∞·0 and ∞/∞ are no numbers.
        let is_nan = c.rho_hi == 0.0 || (square.found & HAS_INFINITY) != 0u;
        found |= select(HAS_INFINITY, HAS_NAN, is_nan);
    } else if ((square.found & HAS_INFINITY) != 0u) {
        alpha = double(vec4<f32>(0.0));
        clipping = double(vec4<f32>(1.0));
    }
    return rounded(divided(alpha, clipping), exponent, found) ^ 0x80000000u;
}

@compute @workgroup_size(WORKGROUP)
fn factors(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid);
    if (!is_there(TENSORS, number)) {
        return;
    }
    unseen_zero = work.control.zero;
    let t = table.items[owner_of(TENSORS, number)];
    var size = nothing();
    var square = nothing();
    for (var chunk = lane; chunk < chunks_of(t); chunk += WORKGROUP) {
        size = joined(size, partial_at(size_at(t, chunk)));
        square = joined(square, partial_at(square_at(t, chunk)));
    }
    let whole_size = sum_of_workgroup(lane, size);
    let whole_square = sum_of_workgroup(lane, square);
    if (lane == 0u) {
        scratch[factor_at(t)] = factor_bits(work.rows[t.row].c, t.len, whole_size, whole_square);
    }
}

@compute @workgroup_size(WORKGROUP)
fn update(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid);
    if (!is_there(CHUNKS, number)) {
        return;
    }
    let t = table.items[owner_of(CHUNKS, number)];
    let chunk = number - t.first[CHUNKS];
    let row = work.rows[t.row];
    let factor = bitcast<f32>(scratch[factor_at(t)]);
    for (var i = lane; 4u * i < chunk_len(t, chunk); i += WORKGROUP) {
        let begin = chunk * table.chunk + 4u * i;
        let inside = lanes_inside(i, chunk_len(t, chunk));
        let g = ready(row, gradients_at(t.gradient4 + begin / 4u));
        let v = estimate(t, begin);
        let at = t.parameter4 + begin / 4u;
        let theta = parameters_at(at) * row.c.shrink + factor * direction(row.c, v, g);
        keep_parameters(at, select(vec4<f32>(0.0), theta, inside));
        if (t.matrices == 0u) {
            keep_variance(t, begin, stored(row.frame, v, inside));
        }
    }
}

@compute @workgroup_size(WORKGROUP)
fn flush(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid) * WORKGROUP + lane;
    if (!is_there(LINES, number)) {
        return;
    }
    let t = table.items[owner_of(LINES, number)];
    let item = number - t.first[LINES];
    let frame = work.rows[t.row].frame;
    let rows = t.matrices * t.rows;
    if (item < rows) {
        let at = t.slots[ROW_VAR] + item;
        row_var[at] = stored(frame, vec4<f32>(row_var[at]), vec4<bool>(true)).x;
    } else {
        let at = t.slots[COL_VAR] + item - rows;
        col_var[at] = stored(frame, vec4<f32>(col_var[at]), vec4<bool>(true)).x;
    }
}
