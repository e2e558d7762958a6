// What the passes of a tensor rule share: the table of tensors, and sums over many numbers.
//
// One dispatch is one pass over all tensors of the table. It is cut into units (chunks, lines, tiles …) that are
// numbered through; each tensor names its first one, so a workgroup or lane finds its tensor by bisection. The
// bindings, the struct `Row` and the functions `gradient_at` and `gradients_at` are generated: see src/shader.rs.

struct Tensor {
    // First vec4 in the bound parameters and in the bound gradients.
    parameter4: u32,
    gradient4: u32,
    // Elements.
    len: u32,
    // Which row of coefficients.
    row: u32,
    // Matrices of the last two axes, or zeros.
    matrices: u32,
    rows: u32,
    columns: u32,
    unused: u32,
    // First element of each slot.
    slots: array<u32, 4>,
    // First word in each area.
    areas: array<u32, 4>,
    // By kind of unit the number of its first one.
    first: array<u32, 8>,
}

struct Tensors {
    // Without the last one, which is none: its numbers are the totals.
    count: u32,
    // Elements of a chunk.
    chunk: u32,
    // How often the passes that repeat ran before.
    turn: u32,
    unused: u32,
    items: array<Tensor>,
}

// The number of a workgroup; the grid has two axes where there are more than one axis may hold.
fn number_of(workgroup: vec3<u32>, grid: vec3<u32>) -> u32 {
    return workgroup.x + workgroup.y * grid.x;
}

// Whether there are so many units of a kind; all rest where the update is left out.
fn is_there(unit: u32, number: u32) -> bool {
    return number < table.items[table.count].first[unit] && work.control.skip == 0u;
}

// The tensor that a unit belongs to: the last one that does not begin behind it.
fn owner_of(unit: u32, number: u32) -> u32 {
    var low = 0u;
    var high = table.count;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (table.items[middle].first[unit] <= number) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

fn chunks_of(tensor: Tensor) -> u32 {
    return (tensor.len + table.chunk - 1u) / table.chunk;
}

// Elements of a tensor's chunk.
fn chunk_len(tensor: Tensor, chunk: u32) -> u32 {
    return min(table.chunk, tensor.len - chunk * table.chunk);
}

const FOUR: vec4<u32> = vec4<u32>(0u, 1u, 2u, 3u);

// How far four elements are from the first; the last of `count` in place of those after it.
fn near(count: u32) -> vec4<u32> {
    return min(FOUR, vec4<u32>(count - 1u));
}

// Four elements of the gradient as the rule sees them.
fn ready(row: Row, gradients: vec4<f32>) -> vec4<f32> {
    return prepared(row.frame, work.control, vec4<f32>(0.0), gradients);
}

// A sum of finite numbers, value·2^exponent, four at a time; and what was found that is not finite.
struct Sum {
    value: Double,
    exponent: i32,
    found: u32,
}

// As small as the exponent of a square may be.
const SMALLEST_EXPONENT: i32 = -252;

fn nothing() -> Sum {
    return Sum(double(vec4<f32>(0.0)), SMALLEST_EXPONENT, 0u);
}

// With an exponent that is not smaller than it was.
fn raised(sum: Sum, exponent: i32) -> Sum {
    return Sum(double_scaled(sum.value, sum.exponent - exponent), exponent, sum.found);
}

fn with_squares(sum: Sum, x: vec4<f32>) -> Sum {
    let finite = finite_part(x);
    let exponent = exponent_of(largest_of_four(magnitude_bits(finite)));
    var more = sum;
    if (2 * exponent > sum.exponent) {
        more = raised(sum, 2 * exponent);
    }
    let y = lowered(finite, more.exponent / 2);
    return Sum(add_product(more.value, y, y), more.exponent, sum.found | found_in(x));
}

fn with_numbers(sum: Sum, x: vec4<f32>) -> Sum {
    let finite = finite_part(x);
    let exponent = exponent_of(largest_of_four(magnitude_bits(finite)));
    var more = sum;
    if (exponent > sum.exponent) {
        more = raised(sum, exponent);
    }
    return Sum(add(more.value, double(lowered(finite, more.exponent))), more.exponent, sum.found | found_in(x));
}

fn joined(a: Sum, b: Sum) -> Sum {
    let exponent = max(a.exponent, b.exponent);
    let value = add(raised(a, exponent).value, raised(b, exponent).value);
    return Sum(value, exponent, a.found | b.found);
}

// The sum of the four, in each of the four.
fn gathered(sum: Sum) -> Sum {
    return Sum(across(sum.value), sum.exponent, sum.found);
}

// The sum over a workgroup's lanes and components; right in lane 0.
fn sum_of_workgroup(lane: u32, sum: Sum) -> Sum {
    let found = any_of_lanes(lane, sum.found);
    // Shifted, so that the lanes' largest is one of unsigned numbers.
    let exponent = i32(largest_of_lanes(lane, u32(sum.exponent - SMALLEST_EXPONENT))) + SMALLEST_EXPONENT;
    return Sum(sum_of_lanes(lane, raised(sum, exponent).value), exponent, found);
}

// As the words of a partial sum, and back. Only one of the four comes back.
fn words_of(sum: Sum) -> vec4<u32> {
    return vec4<u32>(
        bitcast<u32>(sum.value.hi.x),
        bitcast<u32>(sum.value.lo.x),
        bitcast<u32>(sum.exponent),
        sum.found,
    );
}

fn sum_in(words: vec4<u32>) -> Sum {
    let hi = vec4<f32>(bitcast<f32>(words.x), 0.0, 0.0, 0.0);
    let lo = vec4<f32>(bitcast<f32>(words.y), 0.0, 0.0, 0.0);
    return Sum(Double(hi, lo), bitcast<i32>(words.z), words.w);
}

const INFINITY: u32 = 0x7f800000u;
const NOT_A_NUMBER: u32 = 0x7fc00000u;

// A whole number.
fn whole(n: u32) -> Double {
    return quick_two_sum(vec4<f32>(f32(n & 0xffff0000u)), vec4<f32>(f32(n & 0xffffu)));
}

// The bits of value·2^exponent, rounded; or of what was found.
fn rounded(value: Double, exponent: i32, found: u32) -> u32 {
    let finite = bitcast<u32>(scaled(value.hi.x, exponent));
    return select(select(finite, INFINITY, (found & HAS_INFINITY) != 0u), NOT_A_NUMBER, (found & HAS_NAN) != 0u);
}

// The mean of n gathered numbers.
fn mean_bits(sum: Sum, n: u32) -> u32 {
    return rounded(divided(sum.value, whole(n)), sum.exponent, sum.found);
}
