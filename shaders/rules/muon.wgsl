// Twin of src/rules/muon.rs.
//
//     momentum     chunks             B, U, ΣU²
//     norms        tensors            max(‖U‖, ε)
//     normalize    chunks             X = U/max(‖U‖, ε)
//     gram         tiles of A, parts  A = X·Xᵀ                 ┐
//     gather       elements of A      the sum of its parts     │ in turns
//     polynomial   tiles of A         P = c·A·A + b·A          │
//     next         tiles of X         X ← a·X + P·X            ┘
//     update       chunks             θ
//
// X lies in `even` or `odd` by the count of turns before, in the parameter's order; A meanwhile lies in the other one,
// its parts, where it has several, and P in `square`. Rows and columns of X change places where the matrix is tall.
// Before the first turn `square` holds ΣU² by chunk and, behind them, the norm.

struct Scalars {
    weight: f32,
    ahead: f32,
    nesterov: f32,
    a: f32,
    b: f32,
    c: f32,
    eps: f32,
    steps: f32,
    shrink: f32,
    factor: f32,
}

const CHUNKS: u32 = 0u;
const TENSORS: u32 = 1u;
const SQUARE_TILES: u32 = 2u;
const TILES: u32 = 3u;
const PARTS: u32 = 4u;
const PARTED: u32 = 5u;

fn partial_at(at: u32) -> Sum {
    return sum_in(vec4<u32>(square[at], square[at + 1u], square[at + 2u], square[at + 3u]));
}

fn keep_partial(at: u32, sum: Sum) {
    let words = words_of(sum);
    square[at] = words.x;
    square[at + 1u] = words.y;
    square[at + 2u] = words.z;
    square[at + 3u] = words.w;
}

fn square_at(t: Tensor, chunk: u32) -> u32 {
    return t.areas[2] + 4u * chunk;
}

fn norm_at(t: Tensor) -> u32 {
    return square_at(t, chunks_of(t));
}

fn keep_momentum(t: Tensor, i: u32, b: f32, u: f32) {
    if (i < t.len) {
        momentum_buffer[t.slots[0] + i] = b;
        even[t.areas[0] + i] = bitcast<u32>(u);
    }
}

@compute @workgroup_size(WORKGROUP)
fn momentum(
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
        let inside = lanes_inside(i, chunk_len(t, chunk));
        let g = ready(row, gradients_at(t.gradient4 + begin / 4u));
        let at = vec4<u32>(t.slots[0] + begin) + near(t.len - begin);
        let before = vec4<f32>(momentum_buffer[at.x], momentum_buffer[at.y], momentum_buffer[at.z], momentum_buffer[at.w]);
        let b = lerp(before, g, row.c.weight);
        let u = select(vec4<f32>(0.0), select(b, lerp(g, b, row.c.ahead), row.c.nesterov != 0.0), inside);
        let kept = stored(row.frame, b, inside);
        keep_momentum(t, begin, kept.x, u.x);
        keep_momentum(t, begin + 1u, kept.y, u.y);
        keep_momentum(t, begin + 2u, kept.z, u.z);
        keep_momentum(t, begin + 3u, kept.w, u.w);
        sum = with_squares(sum, u);
    }
    let total = sum_of_workgroup(lane, sum);
    if (lane == 0u) {
        keep_partial(square_at(t, chunk), total);
    }
}

@compute @workgroup_size(WORKGROUP)
fn norms(
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
    var sum = nothing();
    for (var chunk = lane; chunk < chunks_of(t); chunk += WORKGROUP) {
        sum = joined(sum, partial_at(square_at(t, chunk)));
    }
    let total = sum_of_workgroup(lane, sum);
    if (lane == 0u) {
        let bits = rounded(root(total.value), total.exponent / 2, total.found);
        // Bits of numbers that are not negative are in their order, NaN the last.
        square[norm_at(t)] = max(bits, bitcast<u32>(work.rows[t.row].c.eps));
    }
}

@compute @workgroup_size(WORKGROUP)
fn normalize(
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
    let norm = bitcast<f32>(square[norm_at(t)]);
    for (var i = lane; i < chunk_len(t, chunk); i += WORKGROUP) {
        let at = t.areas[0] + chunk * table.chunk + i;
        even[at] = bitcast<u32>(bitcast<f32>(even[at]) / norm);
    }
}

// The product of two matrices, a tile of 64×64 to a workgroup, 4×4 of it to a lane:
//
//     for k in 0..inner, ascending: out[i, j] += left[i, k]·right[k, j]
//
// Every 256 steps of k are added up by themselves first, which keeps the error of long sums small. Slabs of 16 steps of
// k are brought to shared memory, each as 16 groups of four numbers for each k, and one group of padding so that the
// writes of neighbouring lanes do not meet in one bank; the next slabs are on their way meanwhile. The steps are
// written out and no index is computed: WebGPU makes sure that loops end and that indices are within arrays, and compilers
// unroll no such loop and keep such arrays in memory, which took ten times as long.
const GRAM: u32 = 0u;
const POLYNOMIAL: u32 = 1u;
const NEXT: u32 = 2u;

const LANES: u32 = 256u;
const SLAB: u32 = 16u;
const BLOCK: u32 = 256u;
const GROUPS: u32 = 17u;

var<workgroup> left_slab: array<vec4<f32>, 272>;
var<workgroup> right_slab: array<vec4<f32>, 272>;

// A lane's part of the product, by row, with the terms of one step of k.
fn stepped(sums: mat4x4<f32>, k: u32, slow: u32, fast: u32) -> mat4x4<f32> {
    let a = left_slab[k * GROUPS + slow];
    let b = right_slab[k * GROUPS + fast];
    return mat4x4<f32>(sums[0] + a.x * b, sums[1] + a.y * b, sums[2] + a.z * b, sums[3] + a.w * b);
}

fn four_steps(sums: mat4x4<f32>, k: u32, slow: u32, fast: u32) -> mat4x4<f32> {
    let half = stepped(stepped(sums, k, slow, fast), k + 1u, slow, fast);
    return stepped(stepped(half, k + 2u, slow, fast), k + 3u, slow, fast);
}

// A matrix that is not taller than wide, as the iteration sees it.
struct Shape {
    rows: u32,
    columns: u32,
    row_stride: u32,
    column_stride: u32,
}

fn shape_of(t: Tensor) -> Shape {
    if (t.rows > t.columns) {
        return Shape(t.columns, t.rows, 1u, t.columns);
    }
    return Shape(t.rows, t.columns, t.columns, 1u);
}

// Terms of a part of A's sums, and how many parts there are.
fn part_len(s: Shape) -> u32 {
    return max(PART, 2u * s.rows);
}

fn parts_of(s: Shape) -> u32 {
    return (s.columns + part_len(s) - 1u) / part_len(s);
}

// X, for `turn` turns before; and A, which lies in the other area.
fn x_at(t: Tensor, turn: u32, at: u32) -> f32 {
    if ((turn & 1u) == 0u) {
        return bitcast<f32>(even[t.areas[0] + at]);
    }
    return bitcast<f32>(odd[t.areas[1] + at]);
}

fn beside_x_at(t: Tensor, turn: u32, at: u32) -> f32 {
    return x_at(t, turn + 1u, at);
}

fn keep_beside_x(t: Tensor, turn: u32, at: u32, value: f32) {
    if ((turn & 1u) == 0u) {
        odd[t.areas[1] + at] = bitcast<u32>(value);
    } else {
        even[t.areas[0] + at] = bitcast<u32>(value);
    }
}

fn left_at(kind: u32, t: Tensor, s: Shape, i: u32, k: u32) -> f32 {
    if (kind == GRAM) {
        return x_at(t, table.turn, i * s.row_stride + k * s.column_stride);
    }
    if (kind == POLYNOMIAL) {
        return beside_x_at(t, table.turn, i * s.rows + k);
    }
    return bitcast<f32>(square[t.areas[2] + i * s.rows + k]);
}

fn right_at(kind: u32, t: Tensor, s: Shape, k: u32, j: u32) -> f32 {
    if (kind == GRAM) {
        return x_at(t, table.turn, j * s.row_stride + k * s.column_stride);
    }
    if (kind == POLYNOMIAL) {
        return beside_x_at(t, table.turn, k * s.rows + j);
    }
    return x_at(t, table.turn, k * s.row_stride + j * s.column_stride);
}

// A product as its lanes see it.
struct Product {
    kind: u32,
    tensor: Tensor,
    shape: Shape,
    // Columns of the product, and the end of its sums.
    width: u32,
    inner: u32,
    part: u32,
}

fn left_within(p: Product, i: u32, k: u32) -> f32 {
    if (i < p.shape.rows && k < p.inner) {
        return left_at(p.kind, p.tensor, p.shape, i, k);
    }
    return 0.0;
}

fn left_four(p: Product, i: u32, k: u32) -> vec4<f32> {
    return vec4<f32>(
        left_within(p, i, k),
        left_within(p, i + 1u, k),
        left_within(p, i + 2u, k),
        left_within(p, i + 3u, k),
    );
}

fn right_within(p: Product, k: u32, j: u32) -> f32 {
    if (j < p.width && k < p.inner) {
        return right_at(p.kind, p.tensor, p.shape, k, j);
    }
    return 0.0;
}

fn right_four(p: Product, k: u32, j: u32) -> vec4<f32> {
    return vec4<f32>(
        right_within(p, k, j),
        right_within(p, k, j + 1u),
        right_within(p, k, j + 2u),
        right_within(p, k, j + 3u),
    );
}

fn keep_product(p: Product, i: u32, j: u32, product: f32) {
    if (i >= p.shape.rows || j >= p.width) {
        return;
    }
    let t = p.tensor;
    let s = p.shape;
    let c = work.rows[t.row].c;
    if (p.kind == GRAM && parts_of(s) > 1u) {
        square[t.areas[2] + (p.part * s.rows + i) * s.rows + j] = bitcast<u32>(product);
    } else if (p.kind == GRAM) {
        keep_beside_x(t, table.turn, i * s.rows + j, product);
    } else if (p.kind == POLYNOMIAL) {
        let a = beside_x_at(t, table.turn, i * s.rows + j);
        square[t.areas[2] + i * s.rows + j] = bitcast<u32>(c.b * a + c.c * product);
    } else {
        let at = i * s.row_stride + j * s.column_stride;
        keep_beside_x(t, table.turn, at, c.a * x_at(t, table.turn, at) + product);
    }
}

fn keep_row(p: Product, i: u32, j: u32, products: vec4<f32>) {
    keep_product(p, i, j, products.x);
    keep_product(p, i, j + 1u, products.y);
    keep_product(p, i, j + 2u, products.z);
    keep_product(p, i, j + 3u, products.w);
}

fn multiply(kind: u32, unit: u32, number: u32, lane: u32) {
    if (!is_there(unit, number)) {
        return;
    }
    let t = table.items[owner_of(unit, number)];
    if (table.turn >= u32(work.rows[t.row].c.steps)) {
        return;
    }
    let s = shape_of(t);
    let width = select(s.rows, s.columns, kind == NEXT);
    let tiles = (width + TILE - 1u) / TILE;
    let of_part = tiles * ((s.rows + TILE - 1u) / TILE);
    let part = (number - t.first[unit]) / of_part;
    let tile = (number - t.first[unit]) % of_part;
    let skipped = select(0u, part * part_len(s), kind == GRAM);
    let inner = select(s.rows, min(s.columns, skipped + part_len(s)), kind == GRAM);
    let p = Product(kind, t, s, width, inner, part);
    // Neighbouring lanes read neighbouring numbers: along k where these lie side by side.
    let left_along = kind != GRAM || s.column_stride == 1u;
    let right_along = (kind == GRAM && s.column_stride == 1u) || (kind == NEXT && s.row_stride == 1u);
    let fast = lane % SLAB;
    let slow = lane / SLAB;
    let left_k = select(slow, fast, left_along);
    let left_group = select(fast, slow, left_along);
    let right_k = select(slow, fast, right_along);
    let right_group = select(fast, slow, right_along);
    let first_row = tile / tiles * TILE;
    let first_column = tile % tiles * TILE;
    let left_row = first_row + 4u * left_group;
    let right_column = first_column + 4u * right_group;
    var left = left_four(p, left_row, skipped + left_k);
    var right = right_four(p, skipped + right_k, right_column);
    var totals = mat4x4<f32>();
    var sums = mat4x4<f32>();
    for (var begin = skipped; begin < inner; begin += SLAB) {
        left_slab[left_k * GROUPS + left_group] = left;
        right_slab[right_k * GROUPS + right_group] = right;
        workgroupBarrier();
        left = left_four(p, left_row, begin + SLAB + left_k);
        right = right_four(p, begin + SLAB + right_k, right_column);
        sums = four_steps(sums, 0u, slow, fast);
        sums = four_steps(sums, 4u, slow, fast);
        sums = four_steps(sums, 8u, slow, fast);
        sums = four_steps(sums, 12u, slow, fast);
        workgroupBarrier();
        if ((begin + SLAB - skipped) % BLOCK == 0u || begin + SLAB >= inner) {
            totals += sums;
            sums = mat4x4<f32>();
        }
    }
    let i = first_row + 4u * slow;
    let j = first_column + 4u * fast;
    keep_row(p, i, j, totals[0]);
    keep_row(p, i + 1u, j, totals[1]);
    keep_row(p, i + 2u, j, totals[2]);
    keep_row(p, i + 3u, j, totals[3]);
}

@compute @workgroup_size(LANES)
fn gram(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    multiply(GRAM, PARTS, number_of(workgroup, grid), lane);
}

@compute @workgroup_size(WORKGROUP)
fn gather(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = number_of(workgroup, grid) * WORKGROUP + lane;
    if (!is_there(PARTED, number)) {
        return;
    }
    let t = table.items[owner_of(PARTED, number)];
    let at = number - t.first[PARTED];
    let s = shape_of(t);
    if (table.turn >= u32(work.rows[t.row].c.steps)) {
        return;
    }
    var sum = 0.0;
    for (var part = 0u; part < parts_of(s); part += 1u) {
        sum += bitcast<f32>(square[t.areas[2] + part * s.rows * s.rows + at]);
    }
    keep_beside_x(t, table.turn, at, sum);
}

@compute @workgroup_size(LANES)
fn polynomial(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    multiply(POLYNOMIAL, SQUARE_TILES, number_of(workgroup, grid), lane);
}

@compute @workgroup_size(LANES)
fn next(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    multiply(NEXT, TILES, number_of(workgroup, grid), lane);
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
    let c = work.rows[t.row].c;
    for (var i = lane; 4u * i < chunk_len(t, chunk); i += WORKGROUP) {
        let begin = chunk * table.chunk + 4u * i;
        let turn = u32(c.steps);
        let of_x = vec4<u32>(begin) + near(t.len - begin);
        let x = vec4<f32>(x_at(t, turn, of_x.x), x_at(t, turn, of_x.y), x_at(t, turn, of_x.z), x_at(t, turn, of_x.w));
        let at = t.parameter4 + begin / 4u;
        let theta = parameters_at(at) * c.shrink + c.factor * x;
        keep_parameters(at, select(vec4<f32>(0.0), theta, lanes_inside(i, chunk_len(t, chunk))));
    }
}
